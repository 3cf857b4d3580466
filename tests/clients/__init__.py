"""Real clients and outside suites, each in an environment of its own, against a Penstock before a perfect model.

``python -m tests.clients`` (``make clients``) runs them; ``docs/compliance.md`` has what they find.
"""
