"""Commands that make figures, tables and the models they need."""
