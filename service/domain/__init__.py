"""Words and rules of the service; knows no framework, no database, no Ray and no torch."""
