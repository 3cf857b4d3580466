"""The Redis broker against real servers that are restarted, stopped, filled, misconfigured, truncated and replaced.

What any broker promises is in the contract (tests/contract/test_redis_broker.py), what its scripts do to the keys in
tests/unit/brokers/test_redis_scripts.py. Here it is about what lies between: connections, news, durability, time.
"""
