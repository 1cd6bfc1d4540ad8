"""What control answers over request/reply: one module a noun, each a list of endpoints."""
