"""gmux shares a few TCP connections to a target among many clients, message by message."""

__version__ = "0.1.0"
