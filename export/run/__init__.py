"""How does a run survive kills, full disks and many processes?"""
