"""Where jobs, queue and logs are kept: `registry` finds the broker that an address means."""
