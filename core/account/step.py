from core.account.graph import Account as Account
from core.account.graph import account as account
