"""What media are, what they cost, and how they are fetched and carried: out of headers, never decoded."""
