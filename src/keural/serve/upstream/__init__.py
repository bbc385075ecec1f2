"""Answers from servers elsewhere, vLLM's or SGLang's, that are spoken to in token ids."""
