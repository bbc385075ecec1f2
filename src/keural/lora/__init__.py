"""Low-rank adapters: trained through PEFT, stored as PEFT stores them, read with checks, merged."""
