"""Histories that releases have written, which today's reducers must still understand."""
