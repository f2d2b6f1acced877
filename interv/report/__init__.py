"""Tables, figures and verdicts, made from a journal."""
