"""The exchange methods, each in a file or folder of this package. Importing the package registers all of them."""

import importlib
import pkgutil

# In alphabetical order, so that methods are listed and tried in the same order on every machine.
for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
