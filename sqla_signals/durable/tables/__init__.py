"""The tables of durable delivery, and the SQL on them."""
