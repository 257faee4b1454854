"""Load on a service, on this machine: how fast it answers, and what becomes of its images when things die."""
