"""What the fleet is asked, what it can carry, and which engine more, or in another role, would help."""
