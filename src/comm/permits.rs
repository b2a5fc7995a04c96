//! Room for messages: bounds what is under way on a link, so that a fast sender cannot fill the
//! memory.

use std::sync::{Arc, Condvar, Mutex};

/// Bounds the messages under way on a link.
#[derive(Clone)]
pub struct Permits(Arc<(Mutex<usize>, Condvar)>);

/// One message under way; dropping it makes room for another.
pub struct Permit(Permits);

impl Permits {
    pub fn new(count: usize) -> Permits {
        Permits(Arc::new((Mutex::new(count), Condvar::new())))
    }

    /// Room, if there is any.
    pub fn try_acquire(&self) -> Option<Permit> {
        let mut count = self.0.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *count = count.checked_sub(1)?;
        drop(count);
        Some(Permit(self.clone()))
    }

    /// Sleeps until there is room.
    pub fn acquire(&self) -> Permit {
        let (count, changed) = &*self.0;
        let guard = count.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut guard =
            changed.wait_while(guard, |n| *n == 0).unwrap_or_else(|poisoned| poisoned.into_inner());
        *guard -= 1;
        drop(guard);
        Permit(self.clone())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let (count, changed) = &*self.0.0;
        *count.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) += 1;
        changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_bound_what_is_under_way() {
        let permits = Permits::new(2);
        let (first, _second) = (permits.acquire(), permits.acquire());
        let third = std::thread::spawn({
            let permits = permits.clone();
            move || drop(permits.acquire())
        });
        assert!(permits.try_acquire().is_none());
        drop(first);
        third.join().unwrap();
        assert_eq!(*permits.0.0.lock().unwrap(), 1);
    }
}
