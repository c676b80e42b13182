from hypothesis import settings

# A slow or busy machine is no fault of the code: no example has a deadline.
settings.register_profile("course", deadline=None)
settings.load_profile("course")
