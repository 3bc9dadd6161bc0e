"""Fast scripted engines and load clients, on raw protocols so that they are not what a benchmark measures."""
