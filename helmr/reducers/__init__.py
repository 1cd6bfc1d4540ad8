"""The rules of Helmr as pure functions: one module per entity, no I/O, no clock.

Each offers ``apply(state, kind, data, at) -> state``, which folds an event, and functions named after commands that
decide, from the present state, which event a command leads to, or raise :class:`helmr.errors.Conflict`.
"""
