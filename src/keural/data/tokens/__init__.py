"""Records to tokens on disk: the token store, and the formats of others."""
