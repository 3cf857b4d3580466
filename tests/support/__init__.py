"""What the integration and chaos tests share: a real server process, raw HTTP, an SSE reader of their own."""
