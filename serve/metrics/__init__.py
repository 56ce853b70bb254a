"""What is counted, and under which name does Prometheus see it?"""
