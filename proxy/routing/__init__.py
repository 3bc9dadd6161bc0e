"""Which stages a request takes. Pure: no instance is chosen here, nothing is sent."""
