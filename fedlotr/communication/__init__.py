"""What crosses between server and clients, and what it costs."""
