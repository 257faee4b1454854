"""The server under load on this machine: throughput, latency, fairness and faults."""
