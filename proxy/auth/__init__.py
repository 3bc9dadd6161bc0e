"""Who a request comes from and what their key may do."""
