"""What is told of requests and of the fleet: metrics, logs, receipts, traces, the page."""
