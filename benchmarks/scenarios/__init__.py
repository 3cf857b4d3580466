"""The comparisons: `targets.toml` says what can be measured, every other `.toml` is one `compare` scenario, and the
Python modules are the measurements that need more than a load."""
