#include "parallel.h"
#include <pthread.h>
#include <stdatomic.h>

// Torch's own threads run the tasks where it has an OpenMP runtime (ssmzoo_use_team): they spin for milliseconds after
// every operator of torch, and would take half a core from threads of ours. Elsewhere, and in a forked child, which has no
// threads of OpenMP's, there is a pool. Its caller waits only for tasks that another thread has begun, so that a worker
// that the system does not schedule delays nobody.

enum { MAX_WORKERS = 255, SPINS = 2000 };

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;  // held by the caller whose job is in the pool
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static int workers;                 // threads started
static int openings;                // how many workers may still join the job; guarded by lock
static _Atomic int active;          // workers inside the job
static _Atomic uint64_t generation; // number of the job
typedef struct {
    void (*body)(void *, int64_t);
    void *context;
    int64_t tasks;
    _Atomic int64_t next;
} work_list;
static work_list job;
static void (*team)(void (*body)(void *), void *context, unsigned threads, unsigned flags);  // GOMP_parallel

void ssmzoo_use_team(void *gomp_parallel) { team = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel; }

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void run_tasks(void *list) {
    work_list *w = list;
    for (int64_t i; (i = atomic_fetch_add(&w->next, 1)) < w->tasks;) w->body(w->context, i);
}

static void *worker(void *unused) {
    (void)unused;
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&generation) == seen; i++) pause_cpu();
        pthread_mutex_lock(&lock);
        while (atomic_load(&generation) == seen || openings <= 0) pthread_cond_wait(&work, &lock);
        seen = atomic_load(&generation);
        openings--;
        atomic_fetch_add(&active, 1);
        pthread_mutex_unlock(&lock);
        run_tasks(&job);
        pthread_mutex_lock(&lock);
        if (atomic_fetch_sub(&active, 1) == 1) pthread_cond_signal(&done);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static void after_fork(void) {  // the child has no workers; it starts its own when it needs them
    pthread_mutex_init(&gate, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&done, NULL);
    workers = openings = 0;
    atomic_store(&active, 0);
    team = NULL;
}

__attribute__((constructor)) static void watch_fork(void) { pthread_atfork(NULL, NULL, after_fork); }

static void start_workers(int wanted) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t thread; workers < wanted && !pthread_create(&thread, &attributes, worker, NULL);) workers++;
    pthread_attr_destroy(&attributes);
}

void parallel_for(int64_t tasks, int64_t threads, void (*body)(void *, int64_t), void *context) {
    int64_t helpers = (threads < tasks ? threads : tasks) - 1;
    if (helpers > MAX_WORKERS) helpers = MAX_WORKERS;
    if (helpers > 0 && team) {
        work_list mine = {body, context, tasks, 0};
        team(run_tasks, &mine, (unsigned)(helpers + 1), 0);
        return;
    }
    if (helpers <= 0 || pthread_mutex_trylock(&gate)) {
        for (int64_t i = 0; i < tasks; i++) body(context, i);
        return;
    }
    pthread_mutex_lock(&lock);
    if (workers < helpers) start_workers((int)helpers);
    job.body = body, job.context = context, job.tasks = tasks;
    atomic_store(&job.next, 0);
    openings = (int)helpers;
    atomic_fetch_add(&generation, 1);
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&lock);
    run_tasks(&job);
    for (int i = 0; i < SPINS && atomic_load(&active); i++) pause_cpu();
    pthread_mutex_lock(&lock);
    openings = 0;  // who wakes up now finds the job closed
    while (atomic_load(&active)) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&gate);
}
