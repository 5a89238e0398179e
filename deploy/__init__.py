"""How the platform is brought up; never holds anything that a service imports."""
