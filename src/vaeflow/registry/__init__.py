"""Registering, the gate, the champion, pulling."""
