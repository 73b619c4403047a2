"""Short words drawn in a font, read by a real OCR engine, which is not here."""
