"""What several engines are made of: batching, the cache, drawing tokens, JSON schemas, vectors."""
