"""The REST API: FastAPI over the domain's ports; knows neither database, Ray nor torch."""
