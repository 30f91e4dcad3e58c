from hypothesis import HealthCheck, settings

# Examples take microseconds; what takes longer is a busy machine.
settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")
