"""What is compiled and what it is fed: programs, plans, credit, steps. No config."""
