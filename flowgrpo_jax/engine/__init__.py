"""What is compiled and what it is fed: programs, workload, credit, overlap. No flags."""
