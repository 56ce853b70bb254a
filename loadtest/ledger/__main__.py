"""`python -m loadtest.ledger`: see `loadtest.ledger.ledger`."""

import sys

from loadtest.ledger.ledger import main

sys.exit(main())
