"""The server's side of engine processes: start, feed, watch, spares."""
