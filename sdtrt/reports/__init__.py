"""What is measured and told: verify, bench, inspect, doctor."""
