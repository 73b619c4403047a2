"""The embedded world: coloured shapes, and a detector that knows them. No networks judge."""
