"""Kept records to tokens on disk: encoding, the token store, and the formats of others."""
