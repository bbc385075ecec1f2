"""Tools as the APIs have them: definitions, which of them an answer calls, and calls and results in a conversation."""
