"""What SGLang's fleets need beside their dialect: all encoders as one, and calls for one item."""
