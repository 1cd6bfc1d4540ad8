"""The ``helmr`` command: one module a noun, and rendering; no rules of its own."""
