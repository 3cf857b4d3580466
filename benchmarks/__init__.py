"""Benchmarks: a load harness for LLM servers, and the comparisons Penstock is judged by. See README.md."""
