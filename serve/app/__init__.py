"""How is a server configured, started, watched and stopped?"""
