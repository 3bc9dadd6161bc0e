"""A request's plan: who may take which leg, what each path would bring, one instance for each."""
