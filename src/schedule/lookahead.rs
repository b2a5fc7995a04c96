//! Actions that are taken ahead: up to the next one that computes, while the one before it does.

use std::collections::VecDeque;

use super::Action;

/// The part of an action list that has been taken ahead.
#[derive(Debug, Default)]
pub struct Lookahead {
    ahead: VecDeque<Action>,
}

impl Lookahead {
    /// The next action of a list. Before one that computes, `seen` is shown those behind it, up to
    /// the next one that computes.
    ///
    /// # Errors
    /// Those of `seen`.
    pub fn next<E>(
        &mut self,
        actions: &mut impl Iterator<Item = Action>,
        mut seen: impl FnMut(&Action) -> Result<(), E>,
    ) -> Result<Option<Action>, E> {
        let Some(action) = self.ahead.pop_front().or_else(|| actions.next()) else {
            return Ok(None);
        };

        if !self.ahead.is_empty() || !action.op.computes() {
            return Ok(Some(action));
        }

        for action in actions.by_ref() {
            seen(&action)?;
            self.ahead.push_back(action);
            if action.op.computes() {
                break;
            }
        }

        Ok(Some(action))
    }
}
