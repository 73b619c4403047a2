"""What a run will cost before it is paid: operations, bytes, chips. Nothing is timed."""
