package engine

import (
	"net/http"
	"testing"
)

func TestVersion(t *testing.T) {
	for _, test := range []struct {
		api, about string
		want       Version
	}{
		{"1.41", `{}`, Version{}},
		{"1.45", `{"OperatingSystem":"Debian GNU/Linux 12 (bookworm)","SecurityOptions":["name=apparmor","name=seccomp,profile=default"]}`, Version{}},
		{"1.46", `{}`, Version{LearnsSubnets: true}},
		{"1.51", `{"SecurityOptions":["name=seccomp,profile=builtin","name=rootless"]}`, Version{LearnsSubnets: true, Rootless: true}},
		{"1.52", `{"OperatingSystem":"Docker Desktop"}`, Version{LearnsSubnets: true, Names: true, Desktop: true}},
		{"1.60", `{}`, Version{LearnsSubnets: true, Names: true}}, // newer than the client
	} {
		f := newFake(t)
		f.api = test.api
		f.bodies["/version"] = `{"Version":"some","ApiVersion":"` + test.api + `"}`
		f.bodies["/info"] = test.about
		test.want.Engine, test.want.API = "some", test.api
		if got, err := f.engine().Version(t.Context()); err != nil || got != test.want {
			t.Errorf("%s: got %+v, %v, want %+v", test.api, got, err, test.want)
		}
	}
}

func TestVersionFails(t *testing.T) {
	f := newFake(t)
	f.status["/info"], f.bodies["/info"] = http.StatusInternalServerError, `{"message":"no disk"}`
	_, err := f.engine().Version(t.Context())
	mentions(t, err, "about its host", "no disk")
	f.status["/version"] = http.StatusInternalServerError
	_, err = f.engine().Version(t.Context())
	mentions(t, err, "for its version")
}
