"""The second embedded world: short words drawn in a font, read by a real OCR engine."""
